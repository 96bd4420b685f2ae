"""Trainings that fail for a reason that smaller steps or batches mend."""

import pytest
import torch

from slimlmm.enduring import enduring
from slimlmm.errors import LossError, UserError
from slimlmm.trainings import Training

SETTINGS = Training(steps=3, pictures_per_step=8, learning_rate=8e-4)


def failing(*errors):
    """Return what fails with these errors in turn and then gives the settings that it was asked with."""
    left = list(errors)

    def make(settings):
        if left:
            raise left.pop(0)
        return settings

    return make


def run(*errors, settings=SETTINGS):
    said, resets = [], []
    found = enduring(failing(*errors), settings, lambda: resets.append(1), said.append)
    return found, said, len(resets)


def test_what_succeeds_is_left_alone():
    assert run() == (SETTINGS, [], 0)


def test_a_loss_that_is_no_number_begins_again_at_half_the_rate_twice_and_is_then_refused():
    found, said, resets = run(LossError("nan at step 2."), LossError("inf at step 1."))
    assert (found.learning_rate, resets) == (2e-4, 2)
    assert (
        found.remarks
        == said
        == [
            "nan at step 2. It begins again at train.learning_rate=0.0004",
            "inf at step 1. It begins again at train.learning_rate=0.0002",
        ]
    )
    with pytest.raises(LossError, match=r"inf\. Tried at 0.0008 and down to 0.0002\."):
        run(*[LossError("inf.")] * 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_takes_half_of_the_pictures_at_once_down_to_one(error):
    found, said, resets = run(error, error)
    assert (found.pictures_per_step, found.accumulate, resets) == (8, 4, 2)
    assert said == [f"out of memory with {many} pictures at once; it begins again with {many // 2}" for many in (8, 4)]
    with pytest.raises(UserError, match=r"out of memory with one picture at once .*pictures_per_step=8"):
        run(*[error] * 4)


def test_an_odd_number_of_pictures_at_once_is_divided_too():
    odd = SETTINGS.model_copy(update={"pictures_per_step": 30})
    errors = [torch.OutOfMemoryError("CUDA out of memory")] * 3
    found, said, _ = run(*errors, settings=odd)
    assert found.accumulate == 30
    assert [text.rpartition(" ")[2] for text in said] == ["15", "5", "1"]


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="shapes"):
        run(RuntimeError("shapes do not fit"))
    with pytest.raises(UserError, match="no rows"):
        run(UserError("no rows"))
