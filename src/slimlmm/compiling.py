"""Blocks as compiled programs during a training: torch.compile block by block, so that equal blocks are compiled once.

A small student spends its steps on many short operations; compiled, they are fused. The 1.3 M student's step took .67 of the
time on a CPU with AMX, after half a minute of compiling (docs/lab-notes.md, 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy
from slimlmm.collate import Batch
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, first_text_block
from slimlmm.half import SAME, half, quick_attention
from slimlmm.trainings import Training

#: largest relative deviation of logits in bfloat16, whose steps are 2^-8: fused operations keep float32 in between
SAME_IN_HALF = 0.05


@contextmanager
def quick(
    model: PreTrainedModel, anatomy: Anatomy, settings: Training, batch: Batch, *, in_half: bool
) -> Iterator[None]:
    """Within the block the model runs as a training wants it: eager attention where that pays, compiled if the recipe says so."""
    with ExitStack() as stack:
        if in_half:
            stack.enter_context(quick_attention(model, batch))
        if settings.compile:
            stack.enter_context(compiled(model, anatomy, settings, batch, in_half=in_half))
        yield


@contextmanager
def compiled(
    model: PreTrainedModel, anatomy: Anatomy, settings: Training, batch: Batch, *, in_half: bool
) -> Iterator[None]:
    """Within the block the model's blocks run compiled, if that gives the logits of `batch` (two pictures) as before.

    Raises:
        UserError: they give other logits (with the deviation), or cannot be compiled here (with the compiler's reason).
    """
    blocks = _blocks(model, anatomy, settings)
    was_training = model.training
    model.train(not _drops_out(model))  # the mode of the training, so that nothing is compiled twice
    wanted_AV = _logits(model, batch, in_half)
    try:
        for block in blocks:
            block.compile(dynamic=True)
        _check(wanted_AV, _logits(model, batch, in_half), SAME_IN_HALF if in_half else SAME)
        model.train(was_training)
        yield
    except TorchDynamoException as error:
        raise UserError(
            f"train.compile: the blocks of {type(model).__name__} cannot be compiled on this machine ({_reason(error)}); "
            "a CPU needs a C++ compiler (g++, or CXX), a GPU triton. Leave compile out to train as they are."
        ) from error
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _blocks(model: PreTrainedModel, anatomy: Anatomy, settings: Training) -> list[nn.Module]:
    """Return the blocks that a training runs whole; where states are looked at, a block is entered by other code each time."""
    lists = [
        axis.layers
        for name, axis in anatomy.axes.items()
        if axis.layers and not (settings.sees_pictures_alone and name.startswith("text."))
    ]
    blocks = [block for name in dict.fromkeys(lists) for block in model.get_submodule(name).children()]
    looked_at = first_text_block(model, anatomy) if "picture_states" in settings.losses else None
    return [block for block in blocks if block is not looked_at]


def _logits(model: PreTrainedModel, batch: Batch, in_half: bool) -> Tensor:
    with half(model.device) if in_half else torch.autocast(model.device.type, enabled=False):
        return answer_logits(model, batch)[0].detach().float()


def _check(wanted_AV: Tensor, found_AV: Tensor, same: float) -> None:
    off = float((found_AV - wanted_AV).abs().max() / wanted_AV.abs().max())
    if not off <= same:
        raise UserError(
            f"train.compile: compiled blocks give other logits, off by {off:.1e} of the largest (at most {same:.0e}); leave "
            "compile out of the recipe."
        )


def _drops_out(model: PreTrainedModel) -> bool:
    """Tell whether two training passes over the same batch differ by chance."""
    parts: list[Any] = [part.config.to_dict() for part in model.modules() if isinstance(part, PreTrainedModel)]
    chances = [value for part in parts for name, value in part.items() if "drop" in name]
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


def _reason(error: BaseException) -> str:
    """Return the first line of what the compiler said."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
