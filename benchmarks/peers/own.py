"""Ours, and the plain small model: what the peers are compared with.

Ours is ``slimlmm compress`` in two pieces: the recipe up to its last cut and repair, then the trainings of that last round, so
that another way to train can start from the very same cut (`last_cut`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shared import PICTURES, Outcome, Task, cache_of, outcome, recipe_of, save, steps_of, train_rows, trained
from transformers import AutoConfig, AutoModelForImageTextToText

from slimlmm import checkpoint, pipeline
from slimlmm.controls import RATE
from slimlmm.progress import Lines
from slimlmm.recipe import Recipe
from slimlmm.results import Results
from slimlmm.trainings import Training


def ours(task: Task) -> Outcome:
    """Compress the teacher by our recipe."""
    rows = train_rows(task)
    recipe = recipe_of(task, rows)
    last = recipe.stages[-1].rounds[-1].train
    with Lines() as tell:
        cut = pipeline.run(task.teacher, task.data, task.out / "run", before_last(recipe), tell=tell, cache=task.cache)
    teacher, student = checkpoint.load(task.teacher), checkpoint.load(last_cut(task.out))
    cache = cache_of(task, teacher, rows)
    done = [
        trained(task, student.model, student.processor, rows, one, teacher=cache, number=len(cut.rounds) + 1000 * part)
        for part, one in enumerate(last)
    ]
    save(task, student.model, student.processor, teacher.stored)
    found = outcome(done)
    before = cut.totals
    assert before is not None
    return found.model_copy(
        update={
            "row_visits": found.row_visits + before.row_visits,
            "training_seconds": found.training_seconds + before.seconds,
            "notes": ("seconds of ours include scores, repairs and the validation of every round",),
        }
    )


def before_last(recipe: Recipe) -> Recipe:
    """Return the recipe without the trainings of its last round."""
    *stages, last = recipe.stages
    *rounds, turn = last.rounds
    last = last.model_copy(update={"rounds": (*rounds, turn.model_copy(update={"train": ()}))})
    return recipe.model_copy(update={"stages": (*stages, last)})


def last_cut(own: Path) -> Path:
    """Return the folder of our model after its last cut and repair, before the trainings of that round."""
    return max((own / "run" / "stages").iterdir()) / "model"


def earlier_visits(own: Path) -> int:
    """Return the row visits that `last_cut` has behind it."""
    totals = Results.load(own / "run" / "results.json").totals
    assert totals is not None
    return totals.row_visits


def scratch(task: Task) -> Outcome:
    """Train our shape from random weights on the labels alone, for as many row visits."""
    rows = train_rows(task)
    teacher, processor = checkpoint.load(task.teacher), checkpoint.load(task.own / "student").processor
    torch.manual_seed(task.seed)
    config = AutoConfig.from_pretrained(task.own / "student")
    student: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    training = Training(
        steps=steps_of(task.row_visits, rows),
        pictures_per_step=PICTURES,
        learning_rate=RATE,
        freeze=(),
        losses={"cross_entropy": 1.0},
    )
    done = trained(task, student.eval(), processor, rows, training, teacher=None, number=0)
    save(task, student, processor, teacher.stored)
    return outcome([done])
