"""Units that go fade out while the whole model trains, and are cut when they say nothing any more.

A gate m multiplies what reads a unit gets of it, and what a block adds to the stream: at 1 the model is what it was, at 0 it
computes as `surgery.masked` and as the cut model do. The code of arXiv 2312.05795 ramps its masks in the same way, step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimlmm import surgery
from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Group, Keep
from slimlmm.blocks import hidden_of
from slimlmm.collate import Batch
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, evaluating
from slimlmm.wiring import owner

#: largest difference of logits between the faded model and the cut one, relative to the largest logit
SAME = 1e-3


@dataclass(slots=True)
class Gate:
    """How much of the units that go is left, from 1 (all) to 0 (none)."""

    value: float = 1.0


def ramp(step: int, fade: int) -> float:
    """Return m after `step` of `fade` optimizer steps: (1 + cos(pi step / fade)) / 2, flat at both ends; 0 from `fade` on."""
    return (1 + math.cos(math.pi * step / fade)) / 2 if step < fade else 0.0


class Ramp(TrainerCallback):
    """Sets the gate for every optimizer step, so that it is 1 in the first and would be 0 in the one behind the last.

    It is set when the step before is over: own answers of a step are written before the Trainer says that it begins.
    """

    def __init__(self, gate: Gate, fade: int) -> None:
        self.gate, self.fade = gate, fade

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the gate for the first step, which in a training taken up again is a later one."""
        self.gate.value = ramp(state.global_step, self.fade)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the gate for the next step."""
        self.gate.value = ramp(state.global_step, self.fade)


def cuts_in_order(anatomy: Anatomy, axes: Mapping[str, int]) -> list[str]:
    """Return the axes in an order in which what was chosen on the whole model can be cut: blocks last, they are renumbered.

    Raises:
        UserError: an axis cannot fade, with the reason.
    """
    for name in axes:
        if reason := why_not(anatomy.axis(name)):
            raise UserError(f"{name} cannot fade: {reason} Cut it in a round without fade.")
    for name in axes:
        tower, _, noun = name.rpartition(".")
        if noun == "queries" and f"{tower}.kv_groups" in axes:
            raise UserError(
                f"{name} and {tower}.kv_groups cannot fade in one round: queries are chosen within the groups that stay. "
                "Cut one of them in a round of its own."
            )
    return sorted(axes, key=lambda name: anatomy.axis(name).kind == "blocks")


def why_not(axis: Axis) -> str:
    """Say why an axis cannot fade, "" where it can."""
    if axis.kind == "blocks":
        return ""
    if axis.kind == "width":
        return (
            "norms take their statistics over the channels that are there, and the factors that make up for a cut "
            "(sqrt(share that stays)) would have to be trained with."
        )
    if axis.kind != "inner" or any(group.masked_role != "consume" for group in axis.groups):
        return "its units are not read by linear layers alone."
    return ""


@contextmanager
def fading(
    model: PreTrainedModel, anatomy: Anatomy, keeps: Mapping[str, Keep], gate: Gate
) -> Iterator[PreTrainedModel]:
    """Let `model` compute, inside the with-block, with the units outside of `keeps` (axis -> choice) scaled by the gate.

    Readers get x' = x * m at the input columns of dropped inner units; a dropped block gives out h + m (block(h) - h).

    Raises:
        UserError: an axis cannot fade, or a dropped unit is read by something else than a linear layer.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name in cuts_in_order(anatomy, dict.fromkeys(keeps, 0)):
            axis = anatomy.axis(name)
            for group in axis.groups:
                dropped = torch.ones(group.units, dtype=torch.bool)
                dropped[keeps[name][group.name].cpu()] = False
                units = dropped.nonzero().flatten()
                if axis.kind == "blocks":
                    _fade_blocks(model, axis, units.tolist(), gate, stack)
                elif len(units):
                    _fade_units(modules, group, units, gate, stack)
        yield model


def _fade_units(modules: Mapping[str, nn.Module], group: Group, units: Tensor, gate: Gate, stack: ExitStack) -> None:
    for slot in group.slots:
        if slot.role != "consume":
            continue
        module = modules.get(owner(slot.parameter))
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"{group.axis} cannot fade: {slot.parameter} is no linear layer's. Cut it in a round without fade."
            )
        going = torch.zeros(module.in_features, dtype=torch.bool)
        going[slot.rows(units, group.units)] = True
        stack.callback(module.register_forward_pre_hook(_scaled(going, gate)).remove)


def _scaled(going: Tensor, gate: Gate) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values = inputs[0]
        scale = torch.ones(len(going), dtype=values.dtype, device=values.device)
        return (values * scale.masked_fill(going.to(values.device), gate.value), *inputs[1:])

    return hook


def _fade_blocks(model: PreTrainedModel, axis: Axis, units: list[int], gate: Gate, stack: ExitStack) -> None:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = hidden_of(args, kwargs)
        after = output[0] if isinstance(output, tuple) else output
        mixed = torch.lerp(before.to(after.dtype), after, gate.value)  # exact at both ends
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    for layer in axis.groups[0].layers(units):
        block = model.get_submodule(f"{axis.layers}.{layer}")
        stack.callback(block.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)


def cut_all(model: PreTrainedModel, keeps: Mapping[str, Keep]) -> PreTrainedModel:
    """Return the model cut along all axes; the choices are those of the whole model."""
    for name in cuts_in_order(describe(model.config), dict.fromkeys(keeps, 0)):
        model = surgery.cut(model, describe(model.config), name, keeps[name])
    return model


@torch.no_grad()
def check_cut(model: PreTrainedModel, keeps: Mapping[str, Keep], gate: Gate, batch: Batch) -> None:
    """Refuse, before anything is trained, where the faded model does not compute what the cut one does; inside `fading`.

    Something reads the units then that no hook sees (a layer that is not called, but whose weights are used).
    """
    cut, before = cut_all(model, keeps), gate.value
    with evaluating(model), evaluating(cut):
        gate.value = 0.0
        try:
            faded_AV, wanted_AV = answer_logits(model, batch)[0], answer_logits(cut, batch)[0]
        finally:
            gate.value = before
    if not bool(((faded_AV - wanted_AV).abs() <= SAME * wanted_AV.abs().max()).all()):
        raise UserError(
            f"{', '.join(keeps)} cannot fade in this model: without them it does not compute what the cut model does. "
            "Cut them in a round without fade."
        )
