"""Control arms: the same final shape on the same rows for as many row visits, reached in another way.

``random-units`` is the same recipe with `at_random`; ``scratch`` and ``random-init`` start from random weights (`untrained`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from slimlmm import checkpoint, data, lineage
from slimlmm.checkpoint import usual_device
from slimlmm.collate import Collator
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, evaluate
from slimlmm.labels import file_of, labelled
from slimlmm.lessons import Taught, asked_of, learnt_from
from slimlmm.packing import can_pack
from slimlmm.progress import Reporter
from slimlmm.recipe import Recipe, Stage, read
from slimlmm.results import Results
from slimlmm.runfolder import RunFolder
from slimlmm.saving import SAVE_EVERY, Saving
from slimlmm.teacher import TeacherCache, weights_fingerprint
from slimlmm.trainings import SHAPES, Training

Untrained = Literal["scratch", "random-init"]
DESCRIPTIONS = {
    "scratch": "same shape, random weights, cross-entropy on the same rows for as many row visits",
    "random-init": "same shape, random weights, same distillation losses for as many row visits",
    "random-units": "same rounds and trainings; units and blocks drawn at random, no repair",
}
#: what `random-units` changes in every round
AT_RANDOM = {"criterion": "random", "groups": "random", "blocks": "random", "repair": ()}
#: a training without a teacher's distribution has no second teacher, and nobody who judges a student's own answers
NO_TEACHER: dict[str, Any] = {
    key: Training.model_fields[key].default
    for key in ("teachers", "own_answers", "own_temperature", "temperature", *SHAPES)
}
#: peak learning rate from random weights
RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Trained:
    """A control that was trained: its answers to the test rows, and what it took."""

    answers: Evaluation
    parameters: int
    row_visits: int
    seconds: float


def at_random(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages with units and blocks drawn at random and without repair."""
    return tuple(
        stage.model_copy(update={"rounds": tuple(turn.model_copy(update=AT_RANDOM) for turn in stage.rounds)})
        for stage in stages
    )


def untrained(
    kind: Untrained,
    run: Path,
    model: str | Path,
    source: str | Path,
    out: Path,
    *,
    tell: Reporter,
    cache: Path | None = None,
) -> Trained:
    """Train the shape of the finished run folder `run` from random weights for as many row visits as that run took.

    Raises:
        UserError: that run is not finished, or trained nothing.
    """
    settings, found = read(run / "recipe.yaml"), Results.load(run / "results.json")
    last = _last_training(settings, run)
    folder = RunFolder(run, cache)
    rows, test = _rows(folder, settings, model, source, tell)
    torch.manual_seed(settings.seed)
    processor = checkpoint.load(run / "final").processor
    # trained in full precision as the student was, whatever format its files are in
    config = AutoConfig.from_pretrained(run / "final")
    student: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).to(usual_device())
    visits = found.totals.row_visits if found.totals else 0
    asked, taught = asked_of(rows, settings.data.teacher_rows, settings.seed)
    training = _training(kind, last)
    steps = max(1, round(visits / rows_a_step(rows, training, taught)))
    training = training.model_copy(update={"steps": steps})
    teacher = None if kind == "scratch" else _teacher(run, model, settings, asked, folder.cache)
    done = train(
        student,
        processor,
        rows,
        training,
        out / "training",
        teacher=teacher,
        kept=lineage.of_run(folder.finished()),
        taught=taught,
        seed=settings.seed,
        progress=lambda facts: tell.step(f"{kind} training", facts["step"], facts["steps"], loss=facts["loss"]),
        saving=Saving(SAVE_EVERY, f"{weights_fingerprint(student)}, {training.model_dump_json()}", tell.say),
    )
    answers = evaluate(student.eval(), processor, test)
    shutil.rmtree(out / "training", ignore_errors=True)
    return Trained(answers, student.num_parameters(), done.row_visits, done.seconds)


def _training(kind: Untrained, last: Training) -> Training:
    """Return the training from random weights beside that of the last shape, but for its steps.

    All is as there but what fresh weights cannot have: frozen parts and a tower without a rate (both would stay at random), the
    rate of weights that are trained already, a stop before all row visits are made. From scratch there is no teacher either.
    """
    fresh: dict[str, Any] = {"freeze": (), "learning_rate": RATE, "validate_every": None}
    fresh |= {} if last.vision_rate else {"vision_rate": 1.0}
    alone: dict[str, Any] = {"losses": {"cross_entropy": 1.0}, **NO_TEACHER} if kind == "scratch" else {}
    return Training.model_validate({**last.model_dump(), **fresh, **alone})


def rows_a_step(rows: Sequence[data.Row], training: Training, taught: Taught = None) -> float:
    """Return the mean row visits of a step of a training on these rows.

    `taught` are the pictures that the teacher is asked about, which are all that a training sees whose losses all ask it.
    """
    seen = learnt_from(rows, training.losses, taught)
    return data.rows_a_step(seen)(training.pictures_per_step, training.questions_per_picture)


def _last_training(settings: Recipe, run: Path) -> Training:
    """Return the training of the last shape."""
    trainings = [one for stage in settings.stages for turn in stage.rounds for one in turn.train]
    if not trainings:
        raise UserError(
            f"{run} trained nothing, so an untrained control has no row visits to match; give it a training."
        )
    return trainings[-1]


def _rows(
    folder: RunFolder, settings: Recipe, model: str | Path, source: str | Path, tell: Reporter
) -> tuple[list[data.Row], list[data.Row]]:
    """Return train and test rows as that run had them, with the answers that it has from the teacher."""
    used, seed = settings.data, settings.seed
    bare = used.answers != "given"
    splits = data.load(source, max_bad_share=used.max_bad_share, unlabelled=bare, allowed=used.pictures)
    rows = splits.need("train", source)
    if bare:
        loaded = checkpoint.load(model, device=usual_device())
        file, every = file_of(folder, loaded, rows), used.answers == "teacher"
        rows, _ = labelled(loaded, rows, splits.validation + splits.test, file, tell, every=every)
    test = splits.need("test", source)
    return data.sample(rows, used.train_rows, seed), data.sample(test, used.test_rows, seed)


def _teacher(run: Path, model: str | Path, settings: Recipe, rows: list[data.Row], cache: Path) -> TeacherCache:
    """Return the cache of that run's teacher: what its leading lossless rounds left, or the model itself."""
    turns = [(stage.name, index, turn) for stage in settings.stages for index, turn in enumerate(stage.rounds, 1)]
    where = model
    for number, (name, index, turn) in enumerate(turns, 1):
        if not turn.drop:
            break
        where = run / "stages" / f"{number:02d}-{name}.{index}" / "model"
    loaded = checkpoint.load(where, device=usual_device())
    collator = Collator(loaded.processor, packed=can_pack(loaded.model, loaded.processor, rows))
    return TeacherCache(loaded.model, collator, cache)
