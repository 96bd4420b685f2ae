"""A training that fails for a reason that smaller steps or batches mend is made again, aloud."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from slimlmm.distill import TrainResult
from slimlmm.errors import LossError, UserError
from slimlmm.trainings import Training

#: how often a training whose loss is no number begins again, at half of the rate each time
HALVINGS = 2


def enduring(
    make: Callable[[Training], TrainResult],
    settings: Training,
    reset: Callable[[], None],
    say: Callable[[str], None],
) -> TrainResult:
    """Return what `make` gives, with what had to be changed as remarks; `reset` puts the weights back before it is made again.

    A loss that is no number: again from the start of the training at half of the learning rate, `HALVINGS` times at most. Out of
    memory: again with half of the pictures at once (of an odd number the next part it divides into), down to one picture.

    Raises:
        LossError: the loss is no number at the lowest rate either.
        UserError: one picture at a time is too much for the memory.
    """
    asked, rate, remarks = settings, settings.learning_rate, list[str]()
    while True:
        try:
            done = make(settings)
            return done.model_copy(update={"remarks": remarks}) if remarks else done
        except LossError as error:
            lower = settings.learning_rate / 2
            if lower < rate / 2**HALVINGS:
                raise LossError(f"{error} Tried at {rate:g} and down to {settings.learning_rate:g}.") from error
            remarks.append(f"{error} It begins again at train.learning_rate={lower:g}")
            settings = settings.model_copy(update={"learning_rate": lower})
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _memory(error):
                raise
            at_once = settings.pictures_per_step // settings.accumulate
            if at_once == 1:
                raise UserError(
                    f"out of memory with one picture at once ({_first(error)}); give train.questions_per_picture less, "
                    f"or a larger machine. The recipe has train.pictures_per_step={asked.pictures_per_step}."
                ) from error
            parts = next(part for part in range(2, at_once + 1) if at_once % part == 0)
            remarks.append(f"out of memory with {at_once} pictures at once; it begins again with {at_once // parts}")
            settings = settings.model_copy(update={"accumulate": parts * settings.accumulate})
        say(remarks[-1])
        reset()


def put_back(source: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give a model, in place, the weights of another of the same shape."""
    with torch.no_grad():
        for name, value in source.named_parameters():
            model.get_parameter(name).copy_(value)


def _memory(error: BaseException) -> bool:
    """Tell whether memory ran out; the CPU's allocator says so in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
