"""What a training asks for that is not there: refused before anything runs, by the key of the recipe that asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.launchers import processes
from slimlmm.losses import NEEDS_TEACHER
from slimlmm.saving import Saving
from slimlmm.spans import check_schedule
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training


def check(
    settings: Training,
    rows: Sequence[Row],
    teacher: TeacherCache | None,
    previous: TeacherCache | None,
    validation: Sequence[Row],
    saving: Saving | None,
) -> None:
    """Refuse rows, schedules, teachers, looks, parts of a step and saved states that a training asks for in vain.

    Raises:
        UserError: with the key, what it needs, and what to do.
    """
    if not rows:
        raise UserError("no rows to train on.")
    check_schedule(settings)
    _looks(settings, validation)
    _teachers(settings, teacher, previous)
    _processes(settings, saving)


def _teachers(settings: Training, first: TeacherCache | None, previous: TeacherCache | None) -> None:
    if settings.own_answers and first is None:
        raise UserError(
            f"train.own_answers={settings.own_answers} needs a teacher that judges the answers; without one leave it out."
        )
    if "previous" in settings.teachers and (first is None or previous is None):
        raise UserError(
            "train.teachers: previous is the model that a round of a run began with, and there is none here (fine-tuning and "
            "untrained controls have no rounds, lossless rounds no teacher); leave it out."
        )
    lacking = [name for name in settings.losses if name in NEEDS_TEACHER]
    if first is None and lacking:
        raise UserError(
            f"train.losses: {', '.join(lacking)} needs a teacher; without one use cross_entropy and pairwise_margin."
        )


def _looks(settings: Training, validation: Sequence[Row]) -> None:
    if not settings.validate_every:
        return
    if not validation:
        raise UserError("train.validate_every needs validation rows, and there are none.")
    if settings.sees_pictures_alone:
        raise UserError(
            "train.validate_every looks at answers, which picture_states alone does not train; leave it out."
        )


def _processes(settings: Training, saving: Saving | None) -> None:
    parts = settings.accumulate * processes()
    if settings.pictures_per_step % parts:
        raise UserError(
            f"train.pictures_per_step={settings.pictures_per_step} must be a multiple of train.accumulate={settings.accumulate}"
            + (f" times {processes()} processes = {parts}." if processes() > 1 else ".")
        )
    if saving is not None and processes() > 1:
        raise UserError(
            f"a training in {processes()} processes cannot be interrupted and taken up; leave `saving` out."
        )


def refuse_shards(trainer: Any, settings: Training) -> None:
    """Refuse, by name, what needs weights whole in every process where processes share them out.

    Raises:
        UserError: with the key and what to do.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    asked = {
        "own_answers: the student answers between two steps": settings.own_answers > 0,
        "optimizer: muon orthogonalises matrices": settings.optimizer == "muon",
    }
    if why := [f"train.{one}" for one, needed in asked.items() if needed]:
        raise UserError(
            f"{'; '.join(why)}, which needs weights whole in every process; FSDP and DeepSpeed share them out. "
            "Leave it out, or train with DDP."
        )
