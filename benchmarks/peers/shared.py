"""What every arm gets and gives back, and the steps that several of them make: rows, the teacher's cache, trainings, saving."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimlmm import checkpoint, data, plan
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.data import Row
from slimlmm.distill import TrainResult, train
from slimlmm.evaluate import Record
from slimlmm.packing import can_pack
from slimlmm.progress import Lines
from slimlmm.recipe import Recipe, Stage, read
from slimlmm.resizing import predict_parameters, resized
from slimlmm.results import File
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training

#: pictures in one optimizer step of the trainings that are not the recipe's
PICTURES = 16


class Task(File):
    """One arm's orders, as a file, so that another environment can carry them out."""

    arm: str
    teacher: Path
    data: Path
    out: Path
    cache: Path
    recipe: Path
    row_visits: int
    test_rows: int
    seed: int
    own: Path
    """folder of our arm at the same target: its shapes, and its models after every round"""

    @property
    def student(self) -> Path:
        """Where the arm leaves its model."""
        return self.out / "student"


class Outcome(File):
    """What an arm did, beside the model in ``student/``."""

    row_visits: int
    training_seconds: float
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    could_not: tuple[str, ...] = ()


class Round(Record):
    """One round of our recipe as other arms see it: the trainings, and the parameters that our model has then."""

    parameters: int
    trainings: tuple[Training, ...]


def train_rows(task: Task) -> list[Row]:
    """Return the train rows of the data folder, all arms the same."""
    return data.load(task.data).need("train", task.data)


def scaled(recipe: Recipe, rows: Sequence[Row], visits: int) -> Recipe:
    """Return the recipe with all steps times one factor, so that its trainings make about `visits` row visits in all."""
    trainings = [one for stage in recipe.stages for turn in stage.rounds for one in turn.train]
    factor = visits / sum(one.steps * _rows_of(one, rows) for one in trainings)

    def longer(one: Training) -> Training:
        return one.model_copy(update={"steps": max(1, round(one.steps * factor))})

    stages = [
        Stage(
            name=stage.name,
            rounds=tuple(t.model_copy(update={"train": tuple(map(longer, t.train))}) for t in stage.rounds),
        )
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": tuple(stages)})


def _rows_of(training: Training, rows: Sequence[Row]) -> float:
    return data.rows_a_step(rows)(training.pictures_per_step, training.questions_per_picture)


def recipe_of(task: Task, rows: Sequence[Row]) -> Recipe:
    """Return our recipe at the task's budget and seed."""
    return scaled(read(task.recipe).model_copy(update={"seed": task.seed}), rows, task.row_visits)


def steps_of(visits: float, rows: Sequence[Row]) -> int:
    """Return the steps over `PICTURES` pictures that make about so many row visits."""
    return max(1, round(visits / data.rows_a_step(rows)(PICTURES, 16)))


def rounds_of(config: Any, recipe: Recipe) -> list[Round]:
    """Return parameters and trainings of each round of our recipe."""
    found, planned = [], dict(describe(config).sizes)
    for turn in (turn for stage in recipe.stages for turn in stage.rounds):
        sizes = plan.restated(describe(config), turn.sizes, planned)
        planned |= turn.sizes
        found.append(Round(parameters=predict_parameters(config, sizes), trainings=turn.train))
        config = resized(config, sizes)
    return found


def cache_of(task: Task, loaded: checkpoint.Loaded, rows: Sequence[Row]) -> TeacherCache:
    """Return the teacher's cache, which all arms share; keys are of content, so none can read what is not its own."""
    return TeacherCache(
        loaded.model, Collator(loaded.processor, packed=can_pack(loaded.model, loaded.processor, rows)), task.cache
    )


def trained(
    task: Task,
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[Row],
    training: Training,
    *,
    teacher: TeacherCache | None,
    number: int,
) -> TrainResult:
    """Make one training with our trainer; `number` moves the seed of its order."""
    assert teacher is None or teacher.model is not model, "a teacher that is trained answers what the student does"
    with Lines() as tell:
        return train(
            model,
            processor,
            rows,
            training,
            task.out / "training",
            teacher=teacher,
            seed=task.seed + number,
            progress=lambda facts: tell.step(task.arm, facts["step"], facts["steps"], loss=facts["loss"]),
        )


def batches(collator: Any, rows: Sequence[Row], steps: int, seed: int) -> Iterator[Any]:
    """Yield `steps` collated batches of `PICTURES` pictures, every epoch in another seeded order, as our trainer does."""
    groups, rng = data.by_picture(rows, 16), random.Random(seed)
    while True:
        order = rng.sample(groups, len(groups))
        for start in range(0, len(order), PICTURES):
            if steps == 0:
                return
            steps -= 1
            yield collator(order[start : start + PICTURES])


def save(task: Task, model: PreTrainedModel, processor: Any, stored: torch.dtype) -> None:
    """Write the student as a plain folder, in the number format of the teacher's files."""
    checkpoint.save(checkpoint.as_stored(model, stored), processor, task.student)


def outcome(trainings: Sequence[TrainResult], *packages: str, **more: Any) -> Outcome:
    """Return the outcome of our trainings in this environment."""
    return Outcome(
        row_visits=sum(one.row_visits for one in trainings),
        training_seconds=sum(one.seconds for one in trainings),
        versions=versions(*packages),
        **more,
    )


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of the named packages beside those that every arm needs."""
    return {name: metadata.version(name) for name in ("torch", "transformers", *packages)}
