"""One training in parts: a part of its steps, at the learning rates that the whole training has there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from slimlmm.errors import UserError
from slimlmm.trainings import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The steps `first` to `last` - 1 of a training, and what is called at them. Adam's moments begin anew with each part."""

    first: int
    last: int
    callbacks: tuple[TrainerCallback, ...] = ()


def warmup_steps(settings: Training) -> int:
    """Return the number of steps with a rising learning rate, of which the first has none at all."""
    return int(settings.steps * settings.warmup)


def check_schedule(settings: Training) -> None:
    """Refuse a schedule whose learning rate follows from more than warmup and the number of the step."""
    try:
        known = isinstance(_whole(SGD([torch.zeros(1)]), settings), LambdaLR)
    except (KeyError, TypeError, ValueError):  # unknown, or one that needs figures of its own
        known = False
    if not known:
        raise UserError(
            f"train.schedule={settings.schedule!r} is unknown or needs more than warmup and the number of the step; use cosine, "
            "linear, constant_with_warmup or another of transformers' schedules that needs no figure of its own."
        )


def schedule(optimizer: Optimizer, settings: Training, first: int) -> LambdaLR:
    """Return the schedule of the whole training from step `first` on."""
    whole = _whole(optimizer, settings)
    assert isinstance(whole, LambdaLR)
    return LambdaLR(optimizer, [_later(rate, first) for rate in whole.lr_lambdas])


def _whole(optimizer: Optimizer, settings: Training) -> Any:
    return get_scheduler(
        settings.schedule, optimizer, num_warmup_steps=warmup_steps(settings), num_training_steps=settings.steps
    )


def _later(rate: Callable[[int], float], first: int) -> Callable[[int], float]:
    return lambda step: rate(step + first)
