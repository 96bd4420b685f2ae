"""What the rounds of one run share, and the model that goes from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimlmm import checkpoint, data, results
from slimlmm.beginnings import Beginnings, Start
from slimlmm.calibration import EACH
from slimlmm.checkdata import alignment
from slimlmm.collate import Collator
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation
from slimlmm.lessons import Taught, asked_of
from slimlmm.lineage import Kept
from slimlmm.packing import can_pack
from slimlmm.progress import Reporter
from slimlmm.recipe import Recipe
from slimlmm.room import KEEPING, Keeping
from slimlmm.runfolder import RunFolder
from slimlmm.teacher import TeacherCache

#: rows on which the teacher is held against itself before it is asked
PROBED = 8


class LetGoError(Exception):
    """A model that is needed was let go, to save room."""


class Handed:
    """A model with its processor as a round hands it over: in memory, or in a folder until it is first asked for."""

    def __init__(self, model: PreTrainedModel | None, processor: Any, folder: Path, device: torch.device) -> None:
        self._model, self._processor, self.folder, self.device = model, processor, folder, device
        self.config: Any = checkpoint.load_config(folder) if model is None else model.config

    @classmethod
    def of(cls, loaded: checkpoint.Loaded) -> Handed:
        """Return one that is in memory."""
        return cls(loaded.model, loaded.processor, loaded.path, loaded.model.device)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._loaded()[0]

    @property
    def processor(self) -> Any:
        """Its processor."""
        return self._loaded()[1]

    def _loaded(self) -> tuple[PreTrainedModel, Any]:
        if self._model is None:
            if not any(self.folder.glob("*.safetensors")):
                raise LetGoError(f"{self.folder} was let go, and is needed")
            found = checkpoint.load(self.folder, device=self.device)
            self._model, self._processor = found.model, found.processor
        return self._model, self._processor


@dataclass(slots=True)
class Job:
    """What every round of one run shares."""

    folder: RunFolder
    recipe: Recipe
    train_rows: list[data.Row]
    asked: list[data.Row]
    """train rows that the teacher is asked about"""
    calibration: list[data.Row]
    validation: list[data.Row]
    vocabulary_rows: list[data.Row]
    tell: Reporter
    taught: Taught = None
    teacher: Handed | None = None
    """the model that is asked: what the lossless rounds left"""
    cache: TeacherCache | None = None
    """what it said; None until a round asks it (`ask`)"""
    previous: TeacherCache | None = None
    """of the model that the round began with, where a training of it asks that"""
    teacher_validation: Evaluation | None = None
    keeping: Keeping = KEEPING
    stored: torch.dtype = torch.float32
    """number format of the files of the model that was given, and of what is handed over"""
    kept: Kept = field(default_factory=dict)
    """layers of the teacher that are still there, by block axis"""
    beginnings: Beginnings | None = None
    """what this run has in common with others that are to be made"""
    notes: tuple[str, ...] = ()
    """what a reader of the results should know of the schedule"""

    def start(self, place: Place) -> Start | None:
        """Return where a round may begin; the half of one is a way of its own."""
        return (
            None
            if self.beginnings is None or place.half
            else self.beginnings.start(self.recipe, place.number, self.tell.say)
        )

    def ask(self) -> None:
        """Take up what the teacher has said, once.

        Raises:
            UserError: distilled from itself through this run's collator and cache, the teacher would not start at a loss of 0.
        """
        if self.cache is not None or self.teacher is None:
            return
        model, processor = self.teacher.model, self.teacher.processor
        packed = can_pack(model, processor, self.asked)
        self.cache = TeacherCache(model, Collator(processor, packed=packed), self.folder.cache)
        loaded = checkpoint.Loaded(model=model, processor=processor, path=self.teacher.folder)
        found = alignment.probed(loaded, self.calibration[:PROBED], self.cache)
        most = alignment.limit(model.device)
        self.tell.say("the teacher against itself, nats an answer token", loss=found.loss)
        if not found.loss <= most:
            raise UserError(
                f"distilling the teacher from itself starts at {found.loss:.3g} nats an answer token, not at 0 (at most "
                f"{most:g}): labels, pictures or what the teacher said do not belong together. `slimlmm check-data` with "
                "--model shows what the model reads of rows."
            )


def job_of(folder: RunFolder, recipe: Recipe, rows: Mapping[str, list[data.Row]], tell: Reporter) -> Job:
    """Return the job of a recipe on its rows by split, drawn as the recipe says."""
    settings = recipe.data
    training = data.sample(rows["train"], settings.train_rows, recipe.seed)
    asked, taught = asked_of(training, settings.teacher_rows, recipe.seed)
    return Job(
        folder=folder,
        recipe=recipe,
        train_rows=training,
        asked=asked,
        calibration=data.spread(asked, settings.calibration_rows, EACH, recipe.seed + 1),
        taught=taught,
        validation=data.sample(rows["validation"], settings.validation_rows, recipe.seed),
        vocabulary_rows=rows["train"] + rows["validation"],
        tell=tell,
    )


@dataclass(frozen=True, slots=True)
class Done:
    """A finished round: the model it left, and its record."""

    left: Handed
    record: results.Round


@dataclass(frozen=True, slots=True)
class Place:
    """Where a round stands in the run: its number from 1, of how many, its stage, its position there; half of the cut or all."""

    number: int
    of: int
    stage: str
    index: int
    half: bool = False

    def __str__(self) -> str:
        return f"round {self.number}/{self.of} {self.name}"

    @property
    def name(self) -> str:
        """Name of the round, as in its folder."""
        return f"{self.stage}.{self.index}" + ("-half" if self.half else "")
